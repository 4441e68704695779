"""What is said of networks: accuracy, wrong predictions, similarity, verdict. Imports storage and below."""
