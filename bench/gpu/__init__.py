"""``python -m bench gpu``: everything that one GPU can tell, in one command and under eight minutes."""
