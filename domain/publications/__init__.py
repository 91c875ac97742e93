"""Publications: the push of a job's student to the Hugging Face Hub."""
