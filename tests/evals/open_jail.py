"""A jail with its doors open: becomes the program and takes nothing away. For the test of the trial."""

import json
import os
import sys

if __name__ == "__main__":
    command = json.loads(sys.argv[1])["run"]
    os.execv(command[0], command)
