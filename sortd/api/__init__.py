"""sortd as a library: an encoder, a classifier, the journal of a dataset, and an estimator of scikit-learn."""
