"""Updates split additively among aggregators, each a process of its own; their sum is opened."""
