"""Files, devices and pictures: what every part of the library stands on."""
