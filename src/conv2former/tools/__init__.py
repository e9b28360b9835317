"""What is built on trained models; nothing imports it but the command line."""
