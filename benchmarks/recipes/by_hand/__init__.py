"""The recipes as books and articles write them, in plain Keras, on the same data.

Each `main(given, output)` returns what it got wrong on Keras 3, measured.
"""
