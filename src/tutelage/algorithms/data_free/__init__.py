"""Survey 5.6: data-free distillation. The data role is played by something that makes its own samples."""
