// Exceptions stop here: whatever libtorch throws becomes a number and a text.
#pragma once

#include "shim.h"

// To be called in a catch block. Keeps the text of what was caught for `coeval_error_text`.
int32_t caught(int32_t device) noexcept;

// Keeps a text of our own.
int32_t failed(Kind kind, const char* text) noexcept;

template <class Body>
int32_t guarded(int32_t device, Body&& body) noexcept {
  try {
    body();
    return kOk;
  } catch (...) {
    return caught(device);
  }
}
