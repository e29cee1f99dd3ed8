import torch

from moert.routers.documents import document_of_token, tokens_per_document


def test_documents():
    bounds = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # the second is empty
    document, D = document_of_token(bounds, 7, bounds.device)
    assert D == 3 and document.tolist() == [0, 0, 0, 2, 2, 2, 2]
    assert tokens_per_document(document, D).tolist() == [3, 0, 4]
    outside = torch.where(torch.arange(7) % 2 == 0, document, torch.tensor([-1, 3, 9, 3, -5, 3, 3]))
    assert tokens_per_document(outside, D).tolist() == [2, 0, 2]


def test_one_document():
    document, D = document_of_token(None, 4, torch.device("cpu"))
    assert D == 1 and tokens_per_document(document, D).tolist() == [4]
    assert document_of_token(None, 0, torch.device("cpu"))[0].shape == (0,)
