"""The rows of a data set as a run would encode them, without loading a model: for the dry run and the preview."""
