// In place of csrc/mma.cuh: m16n8k16 as the PTX manual lays its operands over the lanes, summed in float64, rounded once.
#pragma once

#include <cuda_runtime.h>

namespace nla {

template <typename T>
void multiply(float* out, const uint4& a, uint32_t b0, uint32_t b1, T) {
    struct Lane { float* out; uint32_t a[4], b[2]; } mine{out, {a.x, a.y, a.z, a.w}, {b0, b1}};
    meet_warp(&mine, [](void** all) {
        const auto value = [](uint32_t word, int half) -> double { return T{static_cast<uint16_t>(word >> 16 * half)}; };
        double left[16][16], right[16][8];
        for (int i = 0; i < 32; ++i) {
            const Lane& lane = *static_cast<Lane*>(all[i]);
            const int group = i / 4, at = i % 4 * 2;
            for (int half = 0; half < 2; ++half) {
                for (int part = 0; part < 4; ++part)
                    left[group + part % 2 * 8][at + half + part / 2 * 8] = value(lane.a[part], half);
                for (int part = 0; part < 2; ++part) right[at + half + part * 8][group] = value(lane.b[part], half);
            }
        }
        for (int i = 0; i < 32; ++i) {
            for (int part = 0; part < 4; ++part) {
                const int row = i / 4 + part / 2 * 8, column = i % 4 * 2 + part % 2;
                float& sum = static_cast<Lane*>(all[i])->out[part];
                double exact = sum;
                for (int k = 0; k < 16; ++k) exact += left[row][k] * right[k][column];
                sum = static_cast<float>(exact);
            }
        }
    });
}

}  // namespace nla
