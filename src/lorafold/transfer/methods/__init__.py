"""Ways from one base to another: each a function from a `Job` to what it `Moved`."""
