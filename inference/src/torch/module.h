// How TorchScript is interpreted, for device.cc.
#pragma once

void set_interpreter();
