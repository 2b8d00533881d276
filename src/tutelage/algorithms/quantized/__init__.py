"""Survey 5.7: distillation into networks of few bits. The student role is played by a fake-quantised network."""
