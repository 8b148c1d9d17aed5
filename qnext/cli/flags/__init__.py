"""What may be said: kinds of values, flags that several verbs share, and groups of flags as records of one verb."""
