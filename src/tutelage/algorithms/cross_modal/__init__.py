"""Survey 5.3: the teacher sees another modality, or a better one."""
