"""The programs of the certificate authority."""
