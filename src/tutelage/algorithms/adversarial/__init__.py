"""Survey 5.1: learned critics and adversarial samples."""
