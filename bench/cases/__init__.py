"""The cases: one module a suite that lists them, one beside it for what runs in the workers."""
