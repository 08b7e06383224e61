"""The walk that finds copies between devices, on texts by hand."""

from __future__ import annotations

from transfers import Transfer, transfers

STEP = """\
  mo.graph @step<batch>(%arg0: !mo.tensor<[batch], si64, gpu:0>, %arg1: !mo.tensor<[], si64>) {
    %0 = mo.constant.external [name = "w"] : !mo.tensor<[8], f32>
    %result, %outChain = rmo.mo.transfer[%28] %0 : !mo.tensor<[8], f32> to <"gpu", 0>
    %1 = rmo.add(%arg1, %0) : !mo.tensor<[8], f32> loc("a" %arg0)
    %result_1, %outChain_2 = rmo.mo.transfer[%28] %1 : !mo.tensor<[9], f32> to <"gpu", 0>
    %2 = rmo.shape_to_tensor shape[batch] : !mo.tensor<[1], si64>
    %result_3, %outChain_4 = rmo.mo.transfer[%28] %2 : !mo.tensor<[1], si64> to <"gpu", 0>
    %3 = rmo.shape_to_tensor shape[4] : !mo.tensor<[1], si64>
    %result_5, %outChain_6 = rmo.mo.transfer[%28] %3 : !mo.tensor<[2], si64> to <"gpu", 0>
    %4:2 = mo.while (%0 as %arg7, %3 as %arg8) {
      %5 = rmo.add(%arg7, %0)
      %result_7, %outChain_8 = rmo.mo.transfer[%28] %5 : !mo.tensor<[3], f32, gpu:0> to <"cpu", 0>
    }
    %5 = mo.constant.external [name = "v"] : !mo.tensor<[8], f32>
    %result_9, %outChain_10 = rmo.mo.transfer[%28] %5 : !mo.tensor<[5], f32> to <"gpu", 0>
    %6 = mo.call @a.layer<[batch]>(%0, %arg0) : (!mo.tensor<[8], f32>) -> ()
  }
  mo.graph @a.layer<batch>(%arg0: !mo.tensor<[8], f32>, %arg1: !mo.tensor<[batch], si64>) {
    %result, %outChain = rmo.mo.transfer[%28] %arg0 : !mo.tensor<[6], f32> to <"gpu", 0>
    %result_1, %outChain_2 = rmo.mo.transfer[%28] %arg1 : !mo.tensor<[7], f32> to <"gpu", 0>
  }
"""


def test_copies_of_what_a_step_is_given_are_found_and_no_others() -> None:
    """Of an input, of a size, of what goes round in a loop, of a layer's argument."""
    assert transfers(STEP) == [
        Transfer("step", "tensor<[9], f32>", "gpu"),
        Transfer("step", "tensor<[1], si64>", "gpu"),
        Transfer("step", "tensor<[3], f32, gpu:0>", "cpu"),
        Transfer("a.layer", "tensor<[7], f32>", "gpu"),
    ]
