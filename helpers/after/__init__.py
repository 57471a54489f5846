"""After training: what is wrong with a run, what it changed, which beta to take, handing it over."""
