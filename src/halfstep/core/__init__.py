"""The core: rules that know no framework. It imports numpy and ml_dtypes, nothing else."""
