"""What a vTPM serves is opened, bound, mounted or handed in here: no trio, no TPM."""
