"""How a layer is computed: a folder for each word that `impl=` takes, and what they share."""
