"""The device sources, as package data: nothing here is run by Python."""
