"""The folder, run as a program."""

import program

if __name__ == "__main__":
  program.main()
