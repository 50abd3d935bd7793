// The table of token.cpp, a file of its own as it compiles for as long as the chunked kernels do.
#pragma once

#include "kernels.hpp"

namespace linstate::LINSTATE_VARIANT {
extern const TokenKernels token_kernels;
}
