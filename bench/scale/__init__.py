"""Models of real size on one small machine: peak resident memory and seconds."""
