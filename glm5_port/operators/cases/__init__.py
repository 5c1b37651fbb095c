"""The parity cases of every operator, one file a family. Imported by `glm5_port.testing`, never by `import glm5_port`."""
