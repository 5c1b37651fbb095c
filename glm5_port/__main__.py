"""`python -m glm5_port`, the same as `glm5-port`."""

from glm5_port.cli.app import main

if __name__ == "__main__":
    main()
