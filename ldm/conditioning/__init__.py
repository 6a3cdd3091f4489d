"""What a network is told beside the image and the noise: text, labels, images, boxes, and several of them."""
