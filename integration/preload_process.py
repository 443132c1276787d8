"""Starts a process when it is imported; it has a session of its own and ignores SIGTERM."""

import os
import subprocess

from integration.called import SLEEPER

parent = os.getpid()
helper = subprocess.Popen(["setsid", *SLEEPER])
