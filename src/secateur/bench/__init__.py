"""The benchmark matrix: a plan becomes a graph of content-addressed nodes, which any executor runs and which resumes."""
