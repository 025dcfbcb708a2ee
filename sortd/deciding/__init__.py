"""From a support set to a decision: prototypes of every mode, calibration, abstention; numpy only."""
