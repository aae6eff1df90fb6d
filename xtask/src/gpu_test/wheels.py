# Prints the folders of the CUDA libraries that came as Python packages.
import glob, os, site, sys

folders = list(sys.path) + site.getsitepackages() + [site.getusersitepackages()]
for folder in dict.fromkeys(folders):
    for library in sorted(glob.glob(os.path.join(folder, "nvidia", "*", "lib"))):
        print(library)
