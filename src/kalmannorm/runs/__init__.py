"""What a sweep does: which runs are missing, where each executes. Imports torch only when something is trained."""
