"""Fine-tuning of an image classifier on a dataset's folders, and its promotion to the dataset's classifier."""
