"""Tests of ``sortd.finetune``."""
