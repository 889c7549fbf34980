"""Papers beside the method: FastNeRV and HyperNeRV (codec), the NeRV family and XINC (fit), VIN (vin)."""
