"""The optimizers: states, options, and which delta belongs to which parameter."""
