"""int8 and fp8: calibration, Q/DQ layers, dynamic int8, sensitivity of layers."""
