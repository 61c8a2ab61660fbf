"""The linear probe: its solver against scikit-learn's, and what a probe costs a run."""
