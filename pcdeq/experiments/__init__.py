"""Everything that makes a table: recipes, data, runs, training, results and the command line."""
