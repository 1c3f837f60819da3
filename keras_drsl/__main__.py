"""Run the command by `python -m keras_drsl`."""

import sys

from keras_drsl_command import main

if __name__ == "__main__":
    sys.exit(main())
