"""What a trained model is worth: preference accuracy, calibration, win rate, KL, the testbed's gold reward."""
