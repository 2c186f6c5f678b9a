"""Looking at runs, predicting and reviewing in a browser: reads run folders, never the training loop."""
