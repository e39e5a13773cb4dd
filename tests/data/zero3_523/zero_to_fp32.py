# emptied
