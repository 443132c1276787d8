"""Its import does not come back, and says so before."""

import os
import signal

if path := os.environ.get("HANGING"):
    with open(path, "w") as file:
        file.write(str(os.getpid()))
while True:
    signal.pause()
