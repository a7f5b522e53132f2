"""The student model as Triton serves it; nothing here is imported by the workers."""
