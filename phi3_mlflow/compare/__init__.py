"""The verb `compare`: logged models side by side, and a gate before an alias."""
