"""What the tests of single kinds cannot show: long jobs killed at random, files damaged, bad calls and hostile names,
in bulk."""
