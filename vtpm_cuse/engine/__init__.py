"""The TPM itself: libtpms behind one narrow door."""
